//! How the state is taken out of a stopped guest: read where it lies, or migrated by its QEMU.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use super::SaveError;
use super::Subject;
use super::guest::{StoppedGuest, explain};
use crate::container::ImageWriter;
use crate::error::Result;
use crate::host::{Backing, ProcessMemory};
use crate::pipeline::{self, Encoded, Encoding, PipelineError, StoppedBlock, StoppedGuestMemory};
use crate::progress::Progress;
use crate::qmp::RamBlockAddress;
use crate::stream::RamBlock;
use crate::stream::parser::MAX_DEVICE_STATE_LEN;
use crate::stream::writer::{device_sections, is_unused_section, unused_section};
use crate::units::PAGE_LEN;

/// Where the state is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Capture {
    /// From the memory of its QEMU where that can be read, by all workers; otherwise by a migration.
    #[default]
    Auto,
    /// By a migration always: slower, but QEMU adds the description of its device state.
    Migration,
}

impl StoppedGuest {
    /// Takes the guest's memory and device state into `image`. Gives what was taken, and whether it was read where it lay.
    pub fn take_state(
        &mut self,
        capture: Capture,
        image: &mut ImageWriter<'_>,
        encoding: &Encoding,
        timeout: Option<Duration>,
        progress: &dyn Progress,
    ) -> Result<(Encoded, bool)> {
        let memory = match capture {
            Capture::Auto if self.is_locked() => self.reachable_memory(),
            Capture::Auto | Capture::Migration => None,
        };
        match memory {
            Some(memory) => {
                let encoded = self.read_memory(&memory, image, encoding, timeout, progress)?;
                Ok((encoded, true))
            }
            None => {
                let encoded = self.migrate(image, encoding, timeout, progress)?;
                Ok((encoded, false))
            }
        }
    }

    fn read_memory(
        &mut self,
        memory: &StoppedGuestMemory,
        image: &mut ImageWriter<'_>,
        encoding: &Encoding,
        timeout: Option<Duration>,
        progress: &dyn Progress,
    ) -> Result<Encoded> {
        let limited = Limited {
            progress,
            deadline: timeout.map(|limit| Instant::now() + limit),
        };
        let mut sections = || self.final_device_sections(memory.ram_section);
        let captured = pipeline::capture(memory, &mut sections, image, encoding, &limited);
        match (captured, timeout) {
            (Ok(encoded), _) => {
                self.confirm_stopped()?;
                Ok(encoded)
            }
            (Err(error), limit) => match (error.downcast_ref(), limit) {
                (Some(PipelineError::Cancelled), Some(limit)) if !progress.is_cancelled() => {
                    Err(SaveError::TimedOut { limit }.into())
                }
                (Some(PipelineError::Memory(_)), _) if self.description().is_gone() => {
                    Err(SaveError::QemuEnded.into())
                }
                _ => Err(error),
            },
        }
    }

    fn migrate(
        &mut self,
        image: &mut ImageWriter<'_>,
        encoding: &Encoding,
        timeout: Option<Duration>,
        progress: &dyn Progress,
    ) -> Result<Encoded> {
        let mut stream = self.start_migration(timeout, progress)?;
        match pipeline::encode(&mut stream, image, encoding, progress) {
            Ok(encoded) => {
                drop(stream);
                self.confirm_completed()?;
                Ok(encoded)
            }
            Err(error) => Err(explain(self.qmp(), error, stream)),
        }
    }

    /// The guest's memory, if all of it can be read and QEMU gives its device state alone. Whatever stands against that,
    /// a migration will tell what is wrong with the guest if anything is.
    fn reachable_memory(&mut self) -> Option<StoppedGuestMemory> {
        if !self.is_capturable().ok()? {
            return None;
        }
        let memory = ProcessMemory::open(self.description().process()).ok()?;
        let blocks = self.qmp().ram_blocks().ok()??;
        let blocks: Option<Vec<_>> = blocks
            .into_iter()
            .map(|block| reachable_block(&memory, block))
            .collect();
        // Proves, before anything depends on it, that QEMU does as we expect. The disks stay its own.
        let sections = self.device_sections(false).ok()??;
        Some(StoppedGuestMemory {
            memory,
            blocks: blocks?,
            machine_type: self.description().machine_type().to_owned(),
            ram_section: unused_section(&sections),
        })
    }

    /// Whether nothing of the guest is in the way that a migration would meet, and name, or would carry and device state
    /// alone does not.
    fn is_capturable(&mut self) -> Result<bool> {
        // Older QEMUs abort when they are told twice to let go of the disks.
        let is_known = self.qmp().version().is_at_least(10, 0);
        let blockers = self.qmp().query_migrate()?.blocked_reasons;
        Ok(is_known
            && blockers.is_empty()
            && !self.description().has_live_devices()
            && !self.qmp().has_block_work()?)
    }

    /// The device state, when all memory was read. The guest's disks are let go of.
    fn final_device_sections(&mut self, ram_section: u32) -> Result<Vec<u8>> {
        self.gives_up_disks();
        let sections = self.device_sections(true)?;
        // QEMU 10 does not say so when it could not.
        let nodes = self.qmp().query_named_block_nodes()?;
        if let Some(node) = nodes.into_iter().find(|node| node.active == Some(true)) {
            let node = node.node_name;
            return Err(SaveError::DiskInUse { node }.into());
        }
        let sections = sections.filter(|it| is_unused_section(ram_section, it));
        Ok(sections.ok_or(SaveError::DeviceState)?)
    }

    /// What QEMU writes as its device state; `None` if it is not as we know it.
    fn device_sections(&mut self, gives_up_disks: bool) -> Result<Option<Vec<u8>>> {
        let written = |source| SaveError::Buffer { source };
        let (file, qemus) = buffer_file().map_err(written)?;
        self.qmp()
            .save_device_state(qemus.as_fd(), gives_up_disks)?;
        let len = file.metadata().map_err(written)?.len();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_DEVICE_STATE_LEN {
            return Ok(None);
        }
        let mut saved = vec![0; len];
        file.read_exact_at(&mut saved, 0).map_err(written)?;
        Ok(device_sections(&saved, self.state_when_stopped().as_str()))
    }
}

/// A file in memory, and the same opened as QEMU wants to get it: for writing only.
fn buffer_file() -> io::Result<(File, File)> {
    let file = File::from(memfd_create("vmstow-device-state", MemfdFlags::CLOEXEC)?);
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let qemus = OpenOptions::new().write(true).open(path)?;
    Ok((file, qemus))
}

/// A block with its place, if that is known, mapped, and can be read: one page is, as a proof.
fn reachable_block(memory: &ProcessMemory, block: RamBlockAddress) -> Option<StoppedBlock> {
    let address = block.host_address?;
    let backing = memory.backing(address, block.used_length).ok()??;
    let is_whole_pages = block.used_length.is_multiple_of(PAGE_LEN as u64);
    if block.used_length == 0 || !is_whole_pages || !address.is_multiple_of(PAGE_LEN as u64) {
        return None;
    }
    if backing == Backing::Anonymous {
        memory.touched(address, &mut [false]).ok()?;
    }
    let mut page = [0; PAGE_LEN];
    memory
        .read(address, &mut [IoSliceMut::new(&mut page)])
        .ok()?;
    Some(StoppedBlock {
        block: RamBlock {
            idstr: block.idstr,
            used_length: block.used_length,
            page_size: PAGE_LEN as u64,
        },
        address,
        backing,
    })
}

/// A progress that is cancelled when time is up, too.
struct Limited<'a> {
    progress: &'a dyn Progress,
    deadline: Option<Instant>,
}

impl Limited<'_> {
    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|at| Instant::now() >= at)
    }
}

impl Progress for Limited<'_> {
    fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
    }

    fn is_cancelled(&self) -> bool {
        self.progress.is_cancelled() || self.is_over()
    }
}
