//! The memory of another process: what is mapped where, which pages were ever touched, and its bytes.
//!
//! Reading and writing need the right to trace the process: the same user, or `CAP_SYS_PTRACE`. A page fault that the
//! access causes is the other process's own, as if it had touched the page itself.
//!
//! Source: process_vm_readv(2); proc(5), `maps`; the kernel's `admin-guide/mm/pagemap.rst`.

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use super::error::HostError;
use super::process::ProcessId;
use crate::units::PAGE_LEN;

/// The most slices that one call reads into or writes from.
///
/// Source: `UIO_MAXIOV` of the kernel.
pub const MOST_SLICES: usize = 1024;

/// Bytes of an entry of `pagemap`.
const ENTRY_LEN: usize = 8;

/// Bits 63 and 62 of an entry: the page is in memory, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// What stands behind a range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory: a page that was never touched is zero.
    Anonymous,
    /// A file or memory that is shared: what is not mapped may well hold something.
    Other,
}

/// Another process's memory.
#[derive(Debug)]
pub struct ProcessMemory {
    process: ProcessId,
    pagemap: File,
}

impl ProcessMemory {
    /// Opens the memory of a process.
    ///
    /// # Errors
    /// [`HostError::NoSuchProcess`]; [`HostError::Process`] if we may not look.
    pub fn open(process: ProcessId) -> Result<Self, HostError> {
        let path = format!("/proc/{}/pagemap", process.pid);
        let pagemap = File::open(path).map_err(|source| failed(process, "pagemap", source))?;
        // Looked at with the file in hand: if it is the right one now, the file means it for good.
        match process.is_alive() {
            true => Ok(ProcessMemory { process, pagemap }),
            false => Err(HostError::NoSuchProcess { pid: process.pid }),
        }
    }

    /// What stands behind the `len` bytes at `address`; `None` if not all of them are mapped for reading and writing.
    pub fn backing(&self, address: u64, len: u64) -> Result<Option<Backing>, HostError> {
        let path = format!("/proc/{}/maps", self.process.pid);
        let maps =
            fs::read_to_string(path).map_err(|source| failed(self.process, "maps", source))?;
        Ok(backing_in(&maps, address, len))
    }

    /// Says for each page from `address` on, which is a page's, whether it was touched: it is in memory or swapped out.
    ///
    /// In [`Backing::Anonymous`] memory every other page is zero, unless a userfaultfd serves it.
    pub fn touched(&self, address: u64, pages: &mut [bool]) -> Result<(), HostError> {
        let mut entries = vec![0; pages.len() * ENTRY_LEN];
        let at = address / PAGE_LEN as u64 * ENTRY_LEN as u64;
        self.pagemap
            .read_exact_at(&mut entries, at)
            .map_err(|source| failed(self.process, "pagemap", source))?;
        for (page, entry) in pages.iter_mut().zip(entries.as_chunks::<ENTRY_LEN>().0) {
            *page = u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0;
        }
        Ok(())
    }

    /// Fills `parts`, at most [`MOST_SLICES`], with the bytes that lie one after the other from `address` on.
    ///
    /// # Errors
    /// [`HostError::Process`] if we may not, or if less is mapped there.
    pub fn read(&self, address: u64, parts: &mut [IoSliceMut<'_>]) -> Result<(), HostError> {
        let len = parts.iter().map(|part| part.len()).sum();
        let remote = [remote(address, len)];
        let done = process_vm_readv(Pid::from_raw(self.process.pid), parts, &remote);
        self.all_of(len, done, "process_vm_readv")
    }

    /// Writes `parts`, at most [`MOST_SLICES`], one after the other from `address` on.
    ///
    /// # Errors
    /// [`HostError::Process`] if we may not, or if less is mapped there for writing.
    pub fn write(&self, address: u64, parts: &[IoSlice<'_>]) -> Result<(), HostError> {
        let len = parts.iter().map(|part| part.len()).sum();
        let remote = [remote(address, len)];
        let done = process_vm_writev(Pid::from_raw(self.process.pid), parts, &remote);
        self.all_of(len, done, "process_vm_writev")
    }

    fn all_of(
        &self,
        len: usize,
        done: nix::Result<usize>,
        what: &'static str,
    ) -> Result<(), HostError> {
        match done {
            Ok(found) if found == len => Ok(()),
            Ok(_) => Err(failed(
                self.process,
                what,
                io::ErrorKind::UnexpectedEof.into(),
            )),
            Err(errno) => Err(failed(self.process, what, errno.into())),
        }
    }
}

fn remote(address: u64, len: usize) -> RemoteIoVec {
    // Where addresses have fewer bits nothing is mapped at the highest one.
    let base = usize::try_from(address).unwrap_or(usize::MAX);
    RemoteIoVec { base, len }
}

fn failed(process: ProcessId, what: &'static str, source: io::Error) -> HostError {
    HostError::Process {
        pid: process.pid,
        what,
        source,
    }
}

/// As [`ProcessMemory::backing`], from the text of `maps`: lines of `first-end rwxp offset device inode name`, sorted.
fn backing_in(maps: &str, address: u64, len: u64) -> Option<Backing> {
    let end = address.checked_add(len)?;
    let mut reached = address;
    let mut backing = Backing::Anonymous;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (first, last) = fields.next()?.split_once('-')?;
        let first = u64::from_str_radix(first, 16).ok()?;
        let last = u64::from_str_radix(last, 16).ok()?;
        if last <= reached {
            continue;
        }
        let permissions = fields.next()?;
        if first > reached || !permissions.starts_with("rw") {
            return None;
        }
        let inode = fields.nth(2)?;
        if !permissions.ends_with('p') || inode != "0" {
            backing = Backing::Other;
        }
        reached = last;
        if reached >= end {
            return Some(backing);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our own memory through the eyes of the kernel.
    fn ourselves() -> ProcessMemory {
        let pid = i32::try_from(std::process::id()).unwrap();
        ProcessMemory::open(ProcessId::of(pid).unwrap()).unwrap()
    }

    fn mapped_pages(count: usize) -> (memmap2::MmapMut, u64) {
        let map = memmap2::MmapMut::map_anon(count * PAGE_LEN).unwrap();
        let address = map.as_ptr() as u64;
        (map, address)
    }

    #[test]
    fn bytes_are_read_into_and_written_from_scattered_slices() {
        let (mut map, address) = mapped_pages(2);
        map[..8].copy_from_slice(b"abcdefgh");
        let memory = ourselves();
        let (mut first, mut second) = ([0; 3], [0; 5]);
        let mut parts = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        memory.read(address, &mut parts).unwrap();
        assert_eq!((&first, &second), (b"abc", b"defgh"));
        let parts = [IoSlice::new(b"12"), IoSlice::new(b"345")];
        memory.write(address + 4096, &parts).unwrap();
        assert_eq!(&map[4096..4102], b"12345\0");
    }

    #[test]
    fn what_is_not_mapped_cannot_be_read() {
        let mut bytes = [0; 16];
        let read = ourselves().read(0, &mut [IoSliceMut::new(&mut bytes)]);
        assert!(matches!(read, Err(HostError::Process { .. })));
    }

    #[test]
    fn only_touched_pages_are_touched() {
        let (mut map, address) = mapped_pages(4);
        map[2 * PAGE_LEN] = 1;
        let mut pages = [true; 4];
        ourselves().touched(address, &mut pages).unwrap();
        assert_eq!(pages, [false, false, true, false]);
    }

    #[test]
    fn the_backing_of_our_own_mappings_is_told() {
        let memory = ourselves();
        let (_map, address) = mapped_pages(4);
        let len = 4 * PAGE_LEN as u64;
        assert_eq!(
            memory.backing(address, len).unwrap(),
            Some(Backing::Anonymous)
        );
        assert_eq!(memory.backing(0, len).unwrap(), None);
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        // SAFETY: nobody else knows of the file.
        let shared = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
        let address = shared.as_ptr() as u64;
        assert_eq!(memory.backing(address, len).unwrap(), Some(Backing::Other));
    }

    #[test]
    fn neighbouring_mappings_count_as_one_and_gaps_do_not() {
        let maps = "1000-3000 rw-p 00000000 00:00 0 \n\
                    3000-5000 rw-p 00000000 00:00 0 [anon:ram]\n\
                    6000-7000 rw-s 00000000 00:01 77 /memfd:ram (deleted)\n\
                    7000-8000 r--p 00000000 00:00 0 \n";
        assert_eq!(backing_in(maps, 0x1000, 0x4000), Some(Backing::Anonymous));
        assert_eq!(backing_in(maps, 0x2000, 0x1000), Some(Backing::Anonymous));
        assert_eq!(backing_in(maps, 0x4000, 0x3000), None);
        assert_eq!(backing_in(maps, 0x6000, 0x1000), Some(Backing::Other));
        assert_eq!(backing_in(maps, 0x6000, 0x2000), None);
        assert_eq!(backing_in(maps, 0, 0x2000), None);
        assert_eq!(backing_in(maps, u64::MAX, 2), None);
    }
}
