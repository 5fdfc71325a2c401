//! A userfaultfd of another process: pages are given to it as if it had put them there itself.
//!
//! Somebody who waits for a page of that memory goes on when it comes. The right to trace the process is needed, as
//! for its memory.
//!
//! Source: ioctl_userfaultfd(2), `UFFDIO_COPY` and `UFFDIO_ZEROPAGE`; pidfd_getfd(2).

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::error::HostError;
use super::process::ProcessId;
use crate::units::PAGE_LEN;

/// What the link of such a descriptor reads.
const LINK: &str = "anon_inode:[userfaultfd]";

const UFFDIO_COPY: Opcode = opcode::read_write::<CopyOrder>(0xaa, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<ZeroOrder>(0xaa, 0x04);

/// `struct uffdio_copy`
#[repr(C)]
struct CopyOrder {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`
#[repr(C)]
struct ZeroOrder {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

/// A userfaultfd of another process, which stays open for us whatever that one does.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// All that a process has open.
    ///
    /// # Errors
    /// [`HostError::NoSuchProcess`]; [`HostError::Process`] if we may not look.
    pub fn all_of(process: ProcessId) -> Result<Vec<Self>, HostError> {
        let failed = |what| {
            move |source: io::Error| HostError::Process {
                pid: process.pid,
                what,
                source,
            }
        };
        let handle = process.open()?;
        let directory = format!("/proc/{}/fd", process.pid);
        let entries = fs::read_dir(directory).map_err(failed("fd"))?;
        let mut found = Vec::new();
        for entry in entries.flatten() {
            let is_one = fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == LINK);
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let (true, Some(number)) = (is_one, number) {
                let fd = pidfd_getfd(handle.as_fd(), number, PidfdGetfdFlags::empty());
                let fd = fd.map_err(|errno| failed("pidfd_getfd")(errno.into()))?;
                found.push(Userfault { fd });
            }
        }
        Ok(found)
    }

    /// Puts whole pages at `address`, and lets go on who waits for them. Pages that are there already stay as they are.
    ///
    /// # Errors
    /// `ENOENT` if the memory is not served by this userfaultfd, `ESRCH` if the process has ended.
    pub fn copy(&self, address: u64, pages: &[u8]) -> io::Result<()> {
        let give = |at: usize| {
            let rest = &pages[at..];
            let mut order = CopyOrder {
                dst: address + at as u64,
                src: rest.as_ptr().addr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the opcode belongs to the structure, which lives until the call returns; the kernel reads `len` bytes
            // at `src`, which `rest` owns, and writes into the other process's memory and the field `copy` only.
            let done =
                unsafe { ioctl(&self.fd, Updater::<UFFDIO_COPY, CopyOrder>::new(&mut order)) };
            (done, order.copy)
        };
        each_page(pages.len(), give)
    }

    /// As [`Userfault::copy`] with `page_count` pages of zeros.
    ///
    /// # Errors
    /// As [`Userfault::copy`].
    pub fn zero(&self, address: u64, page_count: usize) -> io::Result<()> {
        let len = page_count * PAGE_LEN;
        let give = |at: usize| {
            let mut order = ZeroOrder {
                start: address + at as u64,
                len: (len - at) as u64,
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: the opcode belongs to the structure, which lives until the call returns; the kernel writes into the
            // other process's memory and the field `zeropage` only.
            let done = unsafe {
                ioctl(
                    &self.fd,
                    Updater::<UFFDIO_ZEROPAGE, ZeroOrder>::new(&mut order),
                )
            };
            (done, order.zeropage)
        };
        each_page(len, give)
    }
}

/// Gives `len` bytes by as many calls as are needed, stepping over pages that are there.
fn each_page(
    len: usize,
    mut give: impl FnMut(usize) -> (Result<(), Errno>, i64),
) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        let (done, given) = give(at);
        match done {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => at += PAGE_LEN,
            // Some pages were given, or the memory was just being changed.
            Err(Errno::AGAIN) => at += usize::try_from(given).unwrap_or(0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
