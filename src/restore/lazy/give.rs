//! Puts pages where the guest waits for them: straight into its memory where we may, through QEMU's migration otherwise.
//!
//! QEMU serves its guest's memory by a userfaultfd. Who may trace QEMU can use that descriptor as QEMU does itself: all
//! workers put pages into their places, without a copy through a socket and QEMU's single thread for it. QEMU does not
//! notice; it asks for pages and believes at the end of the migration that what it was not sent is there or zero, and it is.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::Errno;

use super::task::{Place, Task};
use crate::host::{GuestDir, Userfault};
use crate::stream::postcopy::PageRecords;
use crate::units::{PAGE_LEN, PageIndex};

/// Pages that follow each other.
#[derive(Debug, Clone, Copy)]
pub enum Pages<'a> {
    /// Their bytes.
    Bytes(&'a [u8]),
    /// So many zero pages.
    Zeros(usize),
}

/// Gives pages to one guest. Each page must be given once only.
pub struct Giver<'a> {
    dir: &'a GuestDir,
    task: &'a Task,
    /// Where QEMU keeps the RAMBlocks; read when the first page is given, for before QEMU is told to load anything it is
    /// not known.
    places: OnceLock<Vec<Place>>,
    userfault: OnceLock<Userfault>,
    /// Whether the userfaultfd is there by now, if it can be found at all.
    is_loaded: AtomicBool,
    /// Whether it is of no use to look for it again.
    has_given_up: AtomicBool,
    socket: Mutex<Socket>,
}

struct Socket {
    stream: UnixStream,
    records: PageRecords,
}

impl<'a> Giver<'a> {
    /// For the guest of `task`, whose QEMU reads what is written into `stream` and knows the `ram` section by that number.
    pub fn new(dir: &'a GuestDir, task: &'a Task, stream: UnixStream, ram_section: u32) -> Self {
        let records = PageRecords::new(ram_section);
        Giver {
            dir,
            task,
            places: OnceLock::new(),
            userfault: OnceLock::new(),
            is_loaded: AtomicBool::new(false),
            has_given_up: AtomicBool::new(task.options.through_qemu),
            socket: Mutex::new(Socket { stream, records }),
        }
    }

    /// Puts pages of a block, from `first` on, in their places.
    ///
    /// # Errors
    /// What the kernel says; the guest is gone then, or its QEMU has hung up.
    pub fn give(&self, block: usize, first: PageIndex, pages: Pages<'_>) -> io::Result<()> {
        let Some(place) = self.places().get(block) else {
            return Ok(());
        };
        if let Some(address) = place.address {
            let address = address + first.0 * PAGE_LEN as u64;
            if self.give_directly(address, pages)? {
                return Ok(());
            }
        }
        self.send(place, first, pages)
    }

    fn places(&self) -> &[Place] {
        self.places.get_or_init(|| {
            // Without addresses all goes through QEMU.
            let task = Task::of(self.dir).ok().flatten();
            task.map_or_else(|| self.task.blocks.clone(), |task| task.blocks)
        })
    }

    /// Sends what is no page.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.stream.write_all(bytes)
    }

    /// The device state is loaded: from now on QEMU has its userfaultfd.
    pub fn loaded(&self) {
        self.is_loaded.store(true, Ordering::Relaxed);
    }

    /// Whether pages go straight into the guest's memory.
    pub fn is_direct(&self) -> bool {
        self.userfault.get().is_some()
    }

    /// Whether the pages could be given so.
    fn give_directly(&self, address: u64, pages: Pages<'_>) -> io::Result<bool> {
        if let Some(userfault) = self.userfault.get() {
            return give_by(userfault, address, pages).map(|()| true);
        }
        if self.has_given_up.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let Ok(candidates) = Userfault::all_of(self.task.qemu) else {
            self.has_given_up.store(true, Ordering::Relaxed);
            return Ok(false);
        };
        // One that does not serve this memory refuses.
        let serves = |it: &Userfault| give_by(it, address, pages).is_ok();
        match candidates.into_iter().find(serves) {
            Some(userfault) => {
                // Another thread may have found it as well.
                let _ = self.userfault.set(userfault);
                Ok(true)
            }
            None => {
                let is_loaded = self.is_loaded.load(Ordering::Relaxed);
                self.has_given_up.fetch_or(is_loaded, Ordering::Relaxed);
                Ok(false)
            }
        }
    }

    fn send(&self, place: &Place, first: PageIndex, pages: Pages<'_>) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let Socket { stream, records } = &mut *socket;
        let numbers = (first.0..).map(PageIndex);
        match pages {
            Pages::Bytes(bytes) => {
                for (page, bytes) in numbers.zip(bytes.chunks_exact(PAGE_LEN)) {
                    records.push(&place.idstr, page, Some(bytes));
                }
            }
            Pages::Zeros(count) => {
                let zeros = numbers.take(count);
                zeros.for_each(|page| records.push(&place.idstr, page, None));
            }
        }
        let sent = stream.write_all(records.finish());
        records.clear();
        sent
    }
}

fn give_by(userfault: &Userfault, address: u64, pages: Pages<'_>) -> io::Result<()> {
    match pages {
        Pages::Bytes(bytes) => userfault.copy(address, bytes),
        Pages::Zeros(count) => userfault.zero(address, count),
    }
}

/// Whether an error means that nobody is left to be given anything.
pub fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::PIPE, Errno::CONNRESET, Errno::SRCH, Errno::NOENT];
    let gone = gone.map(Errno::raw_os_error);
    error
        .raw_os_error()
        .is_some_and(|errno| gone.contains(&errno))
}
