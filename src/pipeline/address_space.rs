//! The memory of a saved guest by address: guest-physical, or guest-virtual through the page tables of a processor.

use super::PipelineError;
use super::device_state::device_region;
use super::guest_memory::{GuestMemory, MemoryReader};
use crate::bytes::ReadAt;
use crate::config::Arguments;
use crate::config::guest_physical::{MemoryBlock, Pam, PhysicalMap, is_q35};
use crate::container::{Image, Manifest};
use crate::stream::x86_cpu::{X86Cpu, payload_of, processors};
use crate::stream::x86_paging::Paging;
use crate::stream::{DeviceFields, device_fields};
use crate::units::StreamOffset;

/// What the device state and the manifest tell about addresses.
#[derive(Debug)]
pub struct AddressSpace {
    /// Where the RAMBlocks lie; its blocks are those of [`GuestMemory::blocks`].
    pub physical: PhysicalMap,
    /// The processors, in the order of their numbers; none if the device state does not tell their registers.
    pub cpus: Vec<X86Cpu>,
    /// Where the guest said that its VMCOREINFO note lies: guest-physical address and length. `None` if it has no
    /// `vmcoreinfo` device, or has not said.
    pub vmcoreinfo: Option<(u64, u32)>,
}

impl AddressSpace {
    /// That of the guest in `image`, whose memory is `memory`.
    ///
    /// # Errors
    /// As [`device_region`]; [`PipelineError::Stream`] for a device state that is none.
    pub fn of<R: ReadAt>(
        image: &Image<R>,
        memory: &GuestMemory<'_, R>,
    ) -> Result<Self, PipelineError> {
        let manifest = image.manifest()?;
        let begins_at = manifest.stream.as_ref().and_then(|it| it.device_state_at);
        let (start, region) = device_region(image, begins_at)?;
        let sections = device_fields(&region, start)?;
        let state = DeviceState {
            region: &region,
            start,
            sections: &sections,
        };
        Ok(AddressSpace {
            physical: physical_map(&manifest, memory, &state),
            cpus: processors(&region, start, &sections),
            vmcoreinfo: state.vmcoreinfo(),
        })
    }

    /// The processor of that number.
    pub fn cpu(&self, index: u32) -> Option<&X86Cpu> {
        self.cpus.iter().find(|cpu| cpu.index == index)
    }

    /// A reader for one thread.
    pub fn reader<'m, 'a, R: ReadAt>(
        &'m self,
        memory: &'m GuestMemory<'a, R>,
    ) -> AddressReader<'m, 'a, R> {
        AddressReader {
            physical: &self.physical,
            reader: memory.reader(),
        }
    }
}

fn physical_map<R: ReadAt>(
    manifest: &Manifest,
    memory: &GuestMemory<'_, R>,
    state: &DeviceState<'_>,
) -> PhysicalMap {
    let machine_type = &manifest.machine.machine_type;
    let arguments = Arguments::parse(&manifest.qemu.argv).ok();
    let blocks = memory.blocks().iter();
    let blocks: Vec<MemoryBlock> = blocks
        .map(|block| MemoryBlock {
            idstr: block.idstr.clone(),
            used_length: block.used_length,
        })
        .collect();
    let pam = state.pam(is_q35(machine_type)).unwrap_or(Pam::ALL_RAM);
    PhysicalMap::of(machine_type, arguments.as_ref(), &blocks, pam)
}

struct DeviceState<'r> {
    region: &'r [u8],
    start: StreamOffset,
    sections: &'r [DeviceFields],
}

impl DeviceState<'_> {
    fn payload(&self, idstr: &str) -> Option<&[u8]> {
        payload_of(self.region, self.start, self.sections, idstr)
    }

    /// A PCI device's state begins with be32 of its version and its configuration space.
    fn pam(&self, is_q35: bool) -> Option<Pam> {
        let bridge = if is_q35 { "mch" } else { "I440FX" };
        let payload = self.payload(&format!("0000:00:00.0/{bridge}"))?;
        Pam::of_host_bridge(payload.get(4..4 + 256)?, is_q35)
    }

    /// Whether it was written to, two formats of be16, be32 length, be64 address.
    fn vmcoreinfo(&self) -> Option<(u64, u32)> {
        const ELF_NOTE: u16 = 1;
        let payload = self.payload("vmcoreinfo")?;
        let [has_vmcoreinfo, _, _, format_high, format_low, rest @ ..] = payload else {
            return None;
        };
        let (len, rest) = rest.split_first_chunk()?;
        let (address, _) = rest.split_first_chunk()?;
        let is_note = u16::from_be_bytes([*format_high, *format_low]) == ELF_NOTE;
        let found = (u64::from_be_bytes(*address), u32::from_be_bytes(*len));
        (*has_vmcoreinfo == 1 && is_note).then_some(found)
    }
}

/// Reads guest memory by address; made by [`AddressSpace::reader`].
pub struct AddressReader<'m, 'a, R: ReadAt> {
    physical: &'m PhysicalMap,
    reader: MemoryReader<'m, 'a, R>,
}

impl<R: ReadAt> AddressReader<'_, '_, R> {
    /// Fills `buf` with the bytes at a guest-physical address.
    ///
    /// # Errors
    /// [`PipelineError::NoMemory`] for the first address where there is none; as [`MemoryReader::read`].
    pub fn read(&mut self, address: u64, buf: &mut [u8]) -> Result<(), PipelineError> {
        let mut done = 0;
        while done < buf.len() {
            let address = address.saturating_add(done as u64);
            let range = self.physical.find(address);
            let range = *range.ok_or(PipelineError::NoMemory { address })?;
            let left = buf.len() - done;
            let len = usize::try_from(range.end() - address).map_or(left, |len| len.min(left));
            let offset = range.offset + (address - range.start);
            self.reader
                .read(range.block, offset, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// Fills `buf` with the bytes at a guest-virtual address.
    ///
    /// # Errors
    /// [`PipelineError::PageFault`] for the first page that is not there; as [`AddressReader::read`].
    pub fn read_virtual(
        &mut self,
        paging: &Paging,
        address: u64,
        buf: &mut [u8],
    ) -> Result<(), PipelineError> {
        let mut done = 0;
        while done < buf.len() {
            let at = address.wrapping_add(done as u64);
            let mut read = |entry| self.word(entry);
            let found = paging.translate(at, &mut read)?;
            let found = found.map_err(|source| PipelineError::PageFault {
                address: at,
                source,
            })?;
            let left_in_page = found.page_len - (found.physical & (found.page_len - 1));
            let left = buf.len() - done;
            let len = usize::try_from(left_in_page).map_or(left, |len| len.min(left));
            self.read(found.physical, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// The 8 bytes at a guest-physical address, if there is memory.
    fn word(&mut self, address: u64) -> Result<Option<u64>, PipelineError> {
        let mut bytes = [0; 8];
        match self.read(address, &mut bytes) {
            Ok(()) => Ok(Some(u64::from_le_bytes(bytes))),
            Err(PipelineError::NoMemory { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
